# SPDX-License-Identifier: Apache-2.0
"""What every operator must do, as check functions over a row of ``fastkern.specs.SPECS``.

A check takes ``(spec, device, dtype, ...)`` and raises AssertionError. ``tests/test_ops.py`` runs all of them on every
row, ``tests/test_faults.py`` runs them on planted faults. A new operator adds a row and nothing here.
"""
