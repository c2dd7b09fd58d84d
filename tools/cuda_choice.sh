#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What to compile on this machine, one line: "off", "wheel" (a GPU, but no nvcc >= 12.8: fetch one)
# or the architectures, such as "90a" or "80;90a". FASTKERN_CUDA and CUDAARCHS overrule it.
set -euo pipefail
wish=${FASTKERN_CUDA:-auto}
if [ "$wish" = off ]; then
  echo off
  exit
fi

gpus=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' |
  grep -E '^[0-9]+$' | sort -un | sed 's/^90$/90a/' | paste -sd ';' || true)

# An old nvcc is no nvcc.
nvcc=
for candidate in "${CUDACXX:-}" "$(command -v nvcc || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" \
  "${VENV:-.venv}"/lib/python3.*/site-packages/nvidia/cu*/bin/nvcc; do
  [ -n "$candidate" ] && [ -x "$candidate" ] || continue
  release=$("$candidate" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
  if printf '12.8\n%s\n' "$release" | sort -VC; then
    nvcc=$candidate
    break
  fi
done

if [ -z "$nvcc" ]; then
  if [ -n "$gpus" ] || [ "$wish" = on ]; then echo wheel; else echo off; fi
else
  echo "${CUDAARCHS:-${gpus:-90a}}"
fi
