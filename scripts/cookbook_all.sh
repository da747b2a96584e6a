#!/bin/sh
# Every recipe and loss that docs/fireworks.md tells of, one after the other, on one server.
#
#     ep-rft serve --fireworks        # in another terminal
#     export FIREWORKS_BASE_URL=... FIREWORKS_API_KEY=...
#     scripts/cookbook_all.sh TODAY SEEDS OUTPUT
#
# TODAY and SEEDS are checkouts of fw-ai/cookbook at 76821fa1 and 2507496b; both run in one
# environment. Each run leaves its log and its metrics in a folder of OUTPUT. What is there already is
# not run again.
set -u

[ $# -eq 3 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
today=$1 seeds=$2 output=$3
driver=$(dirname "$0")/cookbook.py
failed=0

run() {
  cookbook=$1 name=$2
  shift 2
  folder=$output/$name
  [ ! -e "$folder/passed" ] || return 0
  mkdir -p "$folder"
  echo "== $name: cookbook.py $*"
  if COOKBOOK=$cookbook python "$driver" "$@" -o "$folder" >"$folder/log.txt" 2>&1; then
    touch "$folder/passed"
  else
    failed=1
  fi
  tail -n 5 "$folder/log.txt" | grep -E '^[a-z_]+_loop,|^  (ok|NOT)|Error' || tail -n 3 "$folder/log.txt"
}

for recipe in async_rl_loop rl_loop; do
  for rollouts in evaluator token_in message_in; do
    run "$today" "today-$recipe-$rollouts" "$recipe" --rollouts "$rollouts"
  done
done
run "$today" today-lora async_rl_loop --lora-rank 8 --learning-rate 1e-3
run "$today" today-lag-2 async_rl_loop --off-policy 2
run "$seeds" seeds-sync async_rl_loop --synchronous
run "$seeds" seeds-lag-2 async_rl_loop --off-policy 2

few='--steps 4 --groups 4 --completions 4 --no-learning-check'
for loss in grpo importance_sampling cispo dapo gspo dro reinforce; do
  # shellcheck disable=SC2086
  {
    run "$seeds" "seeds-$loss-sync" async_rl_loop --loss $loss --synchronous $few
    run "$seeds" "seeds-$loss-on-policy" async_rl_loop --loss $loss $few
    run "$seeds" "seeds-$loss-lag-2" async_rl_loop --loss $loss --off-policy 2 $few
    # On the server; reinforce has no such form there.
    [ $loss = reinforce ] || run "$seeds" "seeds-$loss-builtin" rl_loop --rollouts recipe \
      --loss $loss --loss-path builtin --kl-beta 0 $few
  }
done
exit $failed
