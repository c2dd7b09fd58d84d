#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the libraries and installs the package, editable, into $VENV; with the argument "tests" the
# C++ tests too. One tree, $FASTKERN_BUILD, serves all: a second run compiles only what changed.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
BUILD=${FASTKERN_BUILD:-build/editable}
python=$VENV/bin/python
export SKBUILD_BUILD_DIR=$BUILD
export PATH="$PWD/$VENV/bin:$PATH" CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)}

choice=$(tools/cuda_choice.sh)
if [ "$choice" = off ]; then
  echo "== building for the CPU only"
  export FASTKERN_CUDA=off CMAKE_ARGS=
else
  echo "== building for the CPU and CUDA architectures $choice"
  export FASTKERN_CUDA=on CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$choice"
fi

# Reinstalling is needed only when the package's own description or this choice changes.
key=$( (echo "$choice"; cat pyproject.toml "$0") | sha256sum)
stamp=$BUILD/installed
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ "$(cat "$stamp" 2>/dev/null)" = "$key $site" ] && [ -e "$site/fastkern/_core.abi3.so" ]; then
  cmake --build "$BUILD"
  cmake --install "$BUILD" --prefix "$site" >/dev/null
else
  rm -f "$stamp"
  "$python" -m pip --disable-pip-version-check --quiet install --no-build-isolation --no-deps -e .
  echo "$key $site" >"$stamp"
fi

if [ "${1:-}" = tests ] && ! grep -q '^FASTKERN_TESTS:BOOL=ON$' "$BUILD/CMakeCache.txt"; then
  cmake "$BUILD" -DFASTKERN_TESTS=ON
  cmake --build "$BUILD"
fi
