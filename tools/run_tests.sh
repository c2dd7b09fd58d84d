#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs pytest and ctest on the editable build and prints both closing lines at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
export PATH="$PWD/$VENV/bin:$PATH"
logs=build/logs
mkdir -p "$logs"

# One GPU is shared by all workers, so with a GPU the tests run one after the other.
workers=${JOBS:-$(nproc)}
nvidia-smi >/dev/null 2>&1 && workers=0

echo "== pytest"
python -m pytest -n "$workers" "$@" 2>&1 | tee "$logs/pytest.log"
pytest_status=${PIPESTATUS[0]}
echo "== ctest"
ctest --test-dir "${FASTKERN_BUILD:-build/editable}" --output-on-failure --no-tests=error -j "${JOBS:-$(nproc)}" 2>&1 |
  tee "$logs/ctest.log"
ctest_status=${PIPESTATUS[0]}

echo
echo "pytest: $(grep -E '^=+ .* in [0-9.]+' "$logs/pytest.log" | tail -1 | sed 's/^=* //; s/ =*$//')"
echo "ctest:  $(grep -E 'tests passed|No tests' "$logs/ctest.log" | tail -1)"
exit $((pytest_status != 0 || ctest_status != 0))
