#!/bin/bash
# Everything that only a GPU can tell, in one command of at most ten minutes:
#
#     benchmarks/gpu.sh                             # the GPU; results go to mtlib/book/results/benchmarks
#     benchmarks/gpu.sh --small --device second     # tiny, on a device that every machine has: whether it runs
#     benchmarks/gpu.sh --dry                       # what it would run
#
# Each step has a limit of its own, and one that fails does not stop the others. The exit status is the number of steps
# that failed; their output is in _build/gpu/STEP.log. At the small scale nothing is kept.
# `PYTHON` is the interpreter, .venv/bin/python unless set.
set -u
cd "$(dirname "$0")/.."

device=cuda small= dry= write=--write rounds=11 seconds=210 limits=(150 240 60 150) jobs=8
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2; shift ;;
    --small) small=--small write= rounds=2 seconds=20 jobs=2 limits=(240 150 120 300) ;; # two cores do
    --dry) dry=yes ;;
    *) echo "expected --device NAME, --small or --dry, got $1" >&2; exit 64 ;;
  esac
  shift
done

python=${PYTHON:-.venv/bin/python}
logs=_build/gpu
export MTLIB_PROGRESS=0 MTLIB_SCALE=small MTLIB_TEST_DEVICE=$device PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

step() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  if [ -n "$dry" ]; then echo "$name, at most $seconds s: $*"; return; fi
  mkdir -p "$logs"
  if timeout --kill-after=5 "$seconds" "$@" > "$logs/$name.log" 2>&1
  then echo "$name: done, $((SECONDS - began)) s"
  else echo "$name: FAILED with status $?, $((SECONDS - began)) s; see $logs/$name.log"; failed=$((failed + 1))
  fi
}

# Times first, beside the peers and the two ceilings, while nothing else runs; Omniglot's four columns over three seeds;
# then what is right or wrong: the suite of laws, and every notebook. On a GPU together at most 600 seconds.
step times "${limits[0]}" "$python" benchmarks/meta_gradient.py --device "$device" --repeats "$rounds" $small $write
step columns "${limits[1]}" "$python" benchmarks/columns.py --device "$device" --seconds "$seconds" $small $write
step laws "${limits[2]}" "$python" -m pytest -q -p no:cacheprovider tests/second_device/laws.py
step notebooks "${limits[3]}" "$python" -m pytest -q -p no:cacheprovider -n "${JOBS:-$jobs}" tests/second_device/notebooks.py

[ -n "$dry" ] || echo "$failed steps failed"
exit "$failed"
