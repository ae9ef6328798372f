#!/bin/sh
# Every INTERVAL seconds: write a report to REPORTS/latest and one line to the log.
set -eu

interval="${INTERVAL:-60}"
reports="${REPORTS:-/var/lib/worker}"

# A shell only acts on a signal between commands, so the sleep runs beside it and is waited for.
trap 'exit 0' TERM INT

while true; do
    {
        date -u +"%Y-%m-%dT%H:%M:%SZ"
        cat /proc/loadavg
        df -h /
    } >"$reports/latest.new"
    mv "$reports/latest.new" "$reports/latest"
    echo "report written: load $(cut -d' ' -f1-3 /proc/loadavg)"
    sleep "$interval" &
    wait $!
done
