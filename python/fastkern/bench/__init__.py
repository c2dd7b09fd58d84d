# SPDX-License-Identifier: Apache-2.0
"""``python -m fastkern.bench``: every operator of ``fastkern.specs`` beside every installed peer, checked and timed.

One idea a module: ``scope`` (what a run covers), ``cases`` (what is called), ``optimizers`` and
``attention_fp8`` (rows of their own),
``accuracy`` (is it right), ``timing`` (how long, how much memory), ``runner`` (which measurements, in which order),
``results`` (the document they make), ``tables`` (what is read in it), ``report`` (terminal, JSON, CSV), ``markdown``,
``plot``, ``html`` and ``svg`` (files for people), ``compare`` (with an earlier run), ``cli`` (the command line).
"""
