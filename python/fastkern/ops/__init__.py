# SPDX-License-Identifier: Apache-2.0
"""One module a family: the documented function, the fake and the gradient of each operator."""
