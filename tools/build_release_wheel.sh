#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the wheel that is published, in dist/: every architecture (or WHEEL_ARCHS="80;90a"), one file
# for all Pythons and torches, tagged manylinux_2_28. Incremental in build/release, or $WHEEL_BUILD.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
export PATH="$PWD/$VENV/bin:$PATH" CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)}
python=$VENV/bin/python

if [ "$(tools/cuda_choice.sh)" = off ]; then
  echo "== no nvcc here: the wheel will hold CPU kernels only"
  export FASTKERN_CUDA=off CMAKE_ARGS=
else
  export FASTKERN_CUDA=on CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=${WHEEL_ARCHS:-80;90a;100;120}"
fi

rm -rf build/wheel
mkdir -p build
"$python" -m build --wheel --no-isolation --outdir build/wheel -Cbuild-dir="${WHEEL_BUILD:-build/release}" . >build/wheel.log 2>&1 ||
  { cat build/wheel.log; exit 1; }
mkdir -p dist
rm -f dist/*.whl
# torch's library comes from the user's torch.
"$python" -m auditwheel repair --only-plat --plat manylinux_2_28_x86_64 \
  --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl >build/auditwheel.log 2>&1 || { cat build/auditwheel.log; exit 1; }
ls -l dist/*.whl
