#!/bin/bash
# All that the package keeps of its speed on this machine, in pieces of three minutes on two cores (whole trainings: five):
#
#     benchmarks/record.sh                    # everything, one piece after the other: half an hour
#     benchmarks/record.sh --list             # the pieces
#     benchmarks/record.sh W2 memory/steps    # those that begin so
#
# A piece writes into the files that are there and leaves the others' numbers, so that any may run anew alone. One that
# fails or takes longer than its limit is named at the end, and stops no other; the exit status is how many did. BEFORE is
# a command that each piece runs under, THREADS how many torch has.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export MTLIB_PROGRESS=0 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
threads=(--threads "${THREADS:-$(nproc)}")
failed=()

pieces() {
  "$python" benchmarks/meta_gradient.py --list
  "$python" benchmarks/memory.py --list | sed 's|^|memory/|'
  printf '%s\n' training/ProtoNet training/MAML omniglot/{ProtoNet,MAML}/{0,1,2} processes
}

command_of() {  # PIECE, into `run`
  local rest=${1#*/}
  case $1 in
    memory/*) run=(memory.py --only "${rest%%/*}" --rows "${rest#*/}" "${threads[@]}") ;;
    training/*) run=(training.py --only "$rest" --limit 48 "${threads[@]}") ;;
    omniglot/ProtoNet/*) run=(omniglot.py --only ProtoNet --precision bfloat16 --seeds "${rest#*/}") ;;
    omniglot/MAML/*) run=(omniglot.py --only MAML --processes 2 --seeds "${rest#*/}") ;;
    processes) run=(processes.py --steps 4) ;;
    *) run=(meta_gradient.py --only "$1" "${threads[@]}") ;;
  esac
}

if [ "${1:-}" = --list ]; then pieces; exit 0; fi
[ $# -gt 0 ] || set -- ""
mapfile -t every < <(pieces)
for piece in "${every[@]}"; do
  for start in "$@"; do
    [[ $piece == "$start"* ]] || continue
    command_of "$piece"
    began=$SECONDS
    ${BEFORE:-} timeout --kill-after=5 "${LIMIT:-480}" "$python" "benchmarks/${run[0]}" "${run[@]:1}" --write > /dev/null \
      || failed+=("$piece")
    echo "$piece: $((SECONDS - began)) s"
    break
  done
done
[ ${#failed[@]} -eq 0 ] || printf 'failed: %s\n' "${failed[@]}"
exit ${#failed[@]}
