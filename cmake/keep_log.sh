#!/bin/sh
# Runs a compiler command; what it prints goes to OBJECT.log, and to the screen only when it fails.
log=
previous=
for argument in "$@"; do
    if [ "$previous" = -o ]; then log=$argument.log; fi
    previous=$argument
done
if "$@" >"${log:=/dev/stderr}" 2>&1; then exit 0; fi
status=$?
[ -f "$log" ] && cat "$log" >&2
exit $status
