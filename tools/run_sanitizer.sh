#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the CUDA test programs under each tool of compute-sanitizer. Needs a GPU and `make build-tests`.
set -uo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on this machine" >&2; exit 1; }
failures=0
for source in tests/cpp/test_*.cu; do
  program=${FASTKERN_BUILD:-build/editable}/tests/$(basename "$source" .cu)
  for tool in memcheck racecheck synccheck initcheck; do
    log=build/logs/$(basename "$program")-$tool.log
    mkdir -p build/logs
    if compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" >"$log" 2>&1; then
      echo "ok    $(basename "$program") $tool"
    else
      echo "FAIL  $(basename "$program") $tool"
      tail -30 "$log"
      failures=$((failures + 1))
    fi
  done
done
exit $((failures != 0))
