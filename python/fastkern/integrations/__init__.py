# SPDX-License-Identifier: Apache-2.0
"""What connects the operators to models of other libraries. Nothing here is imported by ``import fastkern``."""
