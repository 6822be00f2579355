#!/usr/bin/env bash
# qcowcache-size=0, or less than two units, turns the cache off: every request
# of a qcow2 client passes to storage as it is.

source "$(dirname "$0")/functions.sh"

fresh_image "$work/image" 5M 16
passes_unchanged "$work/image" qcowcache-size=0
passes_unchanged "$work/image" qcowcache-size=64K
passes_unchanged "$work/image" qcowcache-size=0 qcowcache-cluster-size=64K
passes_unchanged "$work/image" qcowcache-size=100K qcowcache-cluster-size=64K

write_header "$work/image" 21
passes_unchanged "$work/image" qcowcache-size=3M
