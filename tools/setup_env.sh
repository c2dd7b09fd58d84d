#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the virtual environment $VENV: torch, the build tools, and what the machine lacks for a build.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=2.13.0

say() { echo "== $*"; }
fail() { echo "fastkern: $*" >&2; exit 1; }

# Installs Debian packages if that is possible here without asking anyone.
apt_install() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  say "installing $* with apt-get"
  apt-get update -qq >/dev/null 2>&1 || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1
}

command -v "$PYTHON" >/dev/null || fail "no $PYTHON on this machine; install Python >= 3.10 (Debian: apt install python3)"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$PYTHON" -V) is too old, Python >= 3.10 is needed (PYTHON=/path/to/python names another)"
command -v g++ >/dev/null || apt_install g++ || fail "no g++ on this machine (Debian: apt install g++)"
headers='import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
"$PYTHON" -c "$headers" || apt_install python3-dev && "$PYTHON" -c "$headers" ||
  fail "the headers of $PYTHON are missing (Debian: apt install python3-dev)"

# With a GPU and a torch that is already there, that torch is the one to use.
flags=()
if nvidia-smi >/dev/null 2>&1 &&
  "$PYTHON" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))' 2>/dev/null; then
  flags=(--system-site-packages)
fi
if [ ! -x "$VENV/bin/python" ]; then
  say "virtual environment $VENV ${flags[*]}"
  if ! "$PYTHON" -m venv "${flags[@]}" "$VENV" >/dev/null 2>&1; then
    rm -rf "$VENV"
    apt_install python3-venv || fail "$PYTHON cannot make a virtual environment (Debian: apt install python3-venv)"
    "$PYTHON" -m venv "${flags[@]}" "$VENV"
  fi
fi

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

if ! "$VENV/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then
  if nvidia-smi >/dev/null 2>&1; then
    say "torch $TORCH"
    pip install "torch==$TORCH"
  else
    # The CPU build is a tenth of the size: from a local source, from PyTorch's index, else the large one.
    say "torch $TORCH, CPU build"
    pip install "torch==$TORCH+cpu" 2>/dev/null ||
      pip install --timeout 20 --retries 1 "torch==$TORCH+cpu" \
        --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
      { say "no CPU build within reach, taking the default one"; pip install "torch==$TORCH"; }
  fi
fi

tools=("scikit-build-core>=0.11" "cython>=3.1" "numpy>=1.26")
command -v cmake >/dev/null && printf '3.25\n%s\n' "$(cmake --version | sed -n '1s/.* //p')" | sort -VC ||
  tools+=("cmake>=3.25")
command -v ninja >/dev/null || tools+=(ninja)
say "build tools: ${tools[*]}"
pip install "${tools[@]}"

# A GPU without a compiler for it: nvcc from the package registry.
if [ "${FASTKERN_CUDA:-auto}" != off ] && [ "$(tools/cuda_choice.sh)" = wheel ]; then
  say "nvcc 13.0 from the package registry"
  pip install "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"
fi

# GoogleTest for the C++ tests; CMake downloads it if this does not work.
if [ ! -e /usr/include/gtest/gtest.h ] && [ ! -e /usr/local/include/gtest/gtest.h ]; then
  apt_install libgtest-dev || say "no GoogleTest here: CMake will download it for the C++ tests"
fi
