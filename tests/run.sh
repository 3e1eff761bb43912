#!/bin/sh
# Runs the whole test suite; arguments go to pytest. Without root, or on another system than Linux, the tests of the
# lab are skipped, unless NETWEAVER_REQUIRE_LAB=1.
set -eu
cd "$(dirname "$0")/.."
. tests/prepare.sh
system=nothing
if [ "$(id -u)" = 0 ] && [ "$(uname)" = Linux ]; then system=tests; fi
prepare $system test

# Most tests wait for something most of the time, so several run at once; those that measure come after, one by one, and
# then those with a hypervisor, which is emulated and needs a processor of its own.
run() {
    status=0
    NETWEAVER_PHASE=$1 && shift
    export NETWEAVER_PHASE
    .venv/bin/python -m pytest --basetemp .venv/tmp "$@" || status=$?
    if [ $status = 5 ]; then none=$((none + 1)); elif [ $status != 0 ]; then exit $status; fi       # 5: none selected
}
none=0
run together -n 6 --dist worksteal "$@"
run alone "$@"
run hypervisor "$@"
[ $none -lt 3 ] || exit 5
