#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Compiler launcher: runs nvcc, files ptxas's report as <object>.ptxas, passes everything else on.
object=
previous=
for argument in "$@"; do
  [ "$previous" = "-o" ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"
log=$object.ptxas
"$@" 2>"$log"
status=$?
grep -v -e '^ptxas info' -e '^    *[0-9]* bytes stack frame' "$log" >&2
exit $status
