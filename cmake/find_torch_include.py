# SPDX-License-Identifier: Apache-2.0
"""Prints the include directory of the torch that belongs to this interpreter, without importing it."""

from __future__ import annotations

import glob
import os
import site
import sys
import sysconfig

places = list(sys.path)
for base in (sys.prefix, sys.base_prefix):
    scheme = {"base": base, "platbase": base}
    places += [sysconfig.get_path(name, vars=scheme) for name in ("purelib", "platlib")]
places += [*site.getsitepackages(), site.getusersitepackages()]
for base in (sys.prefix, sys.base_prefix, "/usr", "/usr/local"):
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    places += glob.glob(os.path.join(base, "lib", version, "*-packages"))
    places += glob.glob(os.path.join(base, "local", "lib", version, "*-packages"))

for place in places:
    include = os.path.join(place, "torch", "include")
    if os.path.isfile(os.path.join(include, "torch", "csrc", "stable", "library.h")):
        print(include)
        break
