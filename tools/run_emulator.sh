#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds tests/emulator in build/emulator, what changed of it, and runs its driver with the arguments
# given. Needs g++, make and CUDA's headers, on x86-64. JOBS: compilers at once, 1 if not given.
# F16=1: with the kernels of float16, which compiles longer.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD build=$PWD/build/emulator

for include in "${CUDA_HOME:-/usr/local/cuda}/include" \
  "${VENV:-.venv}"/lib/python3.*/site-packages/nvidia/cu*/include; do
  if [ -f "$include/cuda_fp16.h" ]; then
    cuda=$(cd "$include" && pwd)
    break
  fi
done
[ -n "${cuda:-}" ] || { echo "no CUDA headers on this machine" >&2; exit 1; }

# The kernels as C++ that g++ takes. Whatever a rule here misses is an error of the compiler.
stage=$build/stage
rm -rf "$stage"
mkdir -p "$stage"
cp cuda/dispatch.h "$stage"
for room in cuda/*/; do
  case $room in cuda/ptx/ | cuda/core/) ;; *) cp -r "$room" "$stage" ;; esac
done
# asm without instructions, which only hides values from nvcc; shared memory, dynamic and static;
# what headers that are installed include by their place
sed -i -E \
  -e 's/^#include "\.\.\//#include "/' \
  -e 's/^ *asm volatile\("" : .*;$//' \
  -e 's/extern __shared__ (__align__\([0-9]+\) )?(\w+) (\w+)\[\];/\2* const \3 = reinterpret_cast<\2*>(emulator::dynamic_shared());/' \
  -e 's/__shared__ (\w+) (\w+)(\[.*\]);/auto\& \2 = emulator::static_shared<\1\3>([] {});/' \
  "$stage"/*.h "$stage"/*/*
# the one asm outside of cuda/ptx
sed -i '/^    asm volatile($/,/: "memory");$/c\    emulator::store_to_block(shared, rank, &v, sizeof v);' \
  "$stage/norm/group_norm.cuh"
if [ "${F16:-0}" = 0 ]; then
  sed -i 's/return f.template operator()<__half>();/std::abort();/' "$stage/dispatch.h"
  sed -i 's/return dtype == DType::f16 ? f(__half{}) : f(__nv_bfloat16{});/return f(__nv_bfloat16{});/' \
    "$stage/tile/pack.cuh"
fi
# only what changed, so that make sees what did not
mkdir -p "$build/cuda"
(cd "$stage" && find . -type f) | while read -r file; do
  cmp -s "$stage/$file" "$build/cuda/$file" || install -D -m 644 "$stage/$file" "$build/cuda/$file"
done
(cd "$build/cuda" && find . -type f) | while read -r file; do
  [ -f "$stage/$file" ] || rm "$build/cuda/$file"
done
rm -rf "$stage"

make --no-print-directory --silent -j "${JOBS:-1}" -C "$build" -f "$root/tests/emulator/Makefile" \
  ROOT="$root" CUDA_INCLUDE="$cuda" F16="${F16:-0}"
exec "$build/emulator" "$@"
