#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every formatter and linter, each on one line; what fails shows its output. "fix" as the argument
# lets the formatters write.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
mode=${1:-check}
failures=0

# Files of the project that match: those git knows or would add.
files() { git ls-files -co --exclude-standard -- "$@" | sort -u | xargs -r ls -d 2>/dev/null; }

check() {
  local name=$1 output
  shift
  if output=$("$@" 2>&1); then
    echo "ok    $name"
  else
    echo "FAIL  $name"
    echo "$output" | sed 's/^/      /'
    failures=$((failures + 1))
  fi
}

mapfile -t cpp < <(files '*.h' '*.cpp' '*.cu' '*.cuh')
mapfile -t cython < <(files '*.pyx' '*.pxd')
mapfile -t cmake < <(files '*.cmake' 'CMakeLists.txt' '*/CMakeLists.txt')
mapfile -t workflows < <(files '.github/workflows/*.yml')
mapfile -t shell < <(files '*.sh' .ci/run)

if [ "$mode" = fix ]; then
  ruff check --fix --quiet .
  ruff format --quiet .
  clang-format -i "${cpp[@]}"
  gersemi --in-place "${cmake[@]}"
fi

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "cython-lint" cython-lint "${cython[@]}"
check "clang-format" clang-format --dry-run -Werror "${cpp[@]}"
check "gersemi" gersemi --check "${cmake[@]}"
check "bash syntax" bash -n "${shell[@]}"
check "codespell" codespell
check "pyproject" validate-pyproject pyproject.toml
check "workflow schema" check-jsonschema --builtin-schema vendor.github-workflows "${workflows[@]}"
check "zizmor" zizmor --offline --quiet .github/workflows
check "tree" python tools/check_tree.py

[ "$failures" = 0 ] && echo "lint: all checks passed" || echo "lint: $failures checks failed"
exit $((failures != 0))
