#!/bin/bash
# Written by: python -m slurm.submit experiment=super_120b_a12b
#
#SBATCH --job-name=strata-super
#SBATCH --output=/shared/runs/super/slurm/1/job-%j.log
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=4:00:00
#SBATCH --exclude=gpu07
# A start that ends before the run does goes on in the next one, in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
# To this script alone, which tells the ranks.
#SBATCH --signal=B:USR1@300

set -u -o pipefail

# ---- What is run -----------------------------------------------------------------------------

run_dir=/shared/runs/super
recipe=/shared/runs/super/slurm/1/run
last_step=100
python=/shared/strata/.venv/bin/python
cd '/home/me/my work' || exit 2
export PYTHONPATH=/shared/strata${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 # a log says what has happened, also when its process is killed
# one hardware queue, so that communication of tensor parallelism starts before the product it hides behind
export CUDA_DEVICE_MAX_CONNECTIONS=1
# memory of tensors that NCCL has read is free again without waiting for the allocator
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
# NVLink SHARP buffers cost memory that the model needs
export NCCL_NVLS_ENABLE=0
# expert batches change size every step and would fragment the memory
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# Slurm counts the starts of a job, but says nothing of it on the first one.
restart=${SLURM_RESTART_COUNT:-0}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$first_node
# Below the ports Linux hands out by itself; another one each start, as the last may be in use.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restart) % 10000))
if [ ! -d "$recipe" ]; then
    echo "$recipe is not there: the run directory was moved or deleted; submit again"
    exit 2
fi
mkdir -p "$run_dir/logs" "$run_dir/slurm" || exit 2
output=${run_dir//%/%%} # in the name of a log srun replaces %t

container=()
inside=()

# ---- The chain: every start but the last ends by asking for the next ----------------------------
#
# All it knows is in files of the run directory:
#   complete             the last step is done and saved (written by train)
#   stopped              a guard stopped the run for good, and why (written by train)
#   checkpoints/latest   the newest whole checkpoint (written by train)
#   waiting              the next stage needs another number of nodes (written by train)
#   strikes              failures in a row without a new checkpoint
#   bad-nodes            nodes that failed a check, and why
#   slurm/begun          `latest` when the ranks of a start began; gone when that start has ended
#   slurm/chain.jsonl    what happened, a line each

max_strikes=3
chain_length=100
excluded='' # by cluster.sbatch
# As squeue names it: a task of an array has two numbers.
task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
task=${task:-$SLURM_JOB_ID}
step_id=   # process of the srun that runs now
warned=    # the time limit is near
asked=     # Slurm has asked us to leave
code=0

say() { echo "$(date '+%F %T') $*"; }

latest() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none; }

strikes() { # a file that a full disk left empty, or was damaged, says 0
    local count
    count=$(cat "$run_dir/strikes" 2>/dev/null)
    if [[ $count =~ ^[0-9]+$ ]]; then echo "$((10#$count))"; else echo 0; fi
}

# Whether the last step is done; an earlier job may have left the end of a shorter run.
is_complete() { [ "$(cat "$run_dir/complete" 2>/dev/null)" -ge "$last_step" ] 2>/dev/null; }

json() { # json TEXT: as JSON writes it
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "${text//[[:cntrl:]]/ }"
}

record() { # record EVENT REASON
    printf '{"time": "%s", "job": "%s", "task": "%s", "restart": %d, "nodes": "%s", "latest": %s, "event": "%s", "reason": %s}\n' \
        "$(date '+%F %T')" "$SLURM_JOB_ID" "$task" "$restart" "$SLURM_JOB_NODELIST" "$(json "$(latest)")" "$1" "$(json "$2")" \
        >>"$run_dir/slurm/chain.jsonl"
    say "$1: $2"
}

# End for good: no start follows.
finish() { # finish CODE REASON
    record end "$2"
    rm -f "$run_dir/slurm/begun"
    exit "$1"
}

# Count a start that failed; end for good when there were too many without a new checkpoint.
strike() { # strike REASON
    local count=0 begun
    begun=$(cat "$run_dir/slurm/begun" 2>/dev/null)
    if [ -z "$begun" ] || [ "$(latest)" = "$begun" ]; then
        count=$(($(strikes) + 1))
    fi
    rm -f "$run_dir/slurm/begun"
    # Failures that cannot be counted would go on for ever.
    echo "$count" >"$run_dir/strikes" || finish 1 "$1, and $run_dir/strikes cannot be written"
    if [ "$count" -ge "$max_strikes" ]; then
        finish 1 "gave up after $count failures without a new checkpoint, the last: $1"
    fi
}

# Put this job back into the queue, without the bad nodes.
again() { # again REASON
    local bad pause
    put_back_already
    case "$(field JobState) $(field Reason)" in
    *" TimeLimit") ;; # its end is ours to mend
    *COMPLETING* | *CANCELLED*) finish 3 "cancelled" ;;
    esac
    if [ $((restart + 1)) -ge "$chain_length" ]; then
        finish 1 "$1; this was start $((restart + 1)) of cluster.chain_length=$chain_length"
    fi
    record requeue "$1"
    rm -f "$run_dir/slurm/begun"
    trap '' TERM # comes with the requeue
    # By the name of the task: one task of an array has the number of the whole array.
    for pause in 10 20 40 ""; do # its controller may be starting again
        scontrol requeue "$task" && break
        [ -n "$pause" ] || finish 1 "Slurm refuses to requeue this job"
        sleep "$pause"
    done
    # The job is pending now, though this script still runs: only a pending job's nodes can be
    # changed. Without StartTime it would wait until its old credentials have expired.
    if [ -e "$run_dir/bad-nodes" ]; then # empty: they may be used again
        bad=$(sed -e 's/[[:space:]].*//' -e '/^$/d' "$run_dir/bad-nodes" | sort -u | paste -sd ,)
        bad=$excluded${excluded:+${bad:+,}}$bad
        set -- ExcNodeList="$bad"
    else
        set --
    fi
    scontrol update JobId="$task" StartTime=now "$@"
    exit 0
}

# Run a command so that traps run at once; $code says how it ended.
in_foreground() {
    "$@" &
    step_id=$!
    [ -z "$warned" ] || on_warning # it came before there was anybody to tell
    while :; do
        wait "$step_id"
        code=$?
        # A trapped signal ends `wait` before the command has ended.
        kill -0 "$step_id" 2>/dev/null || break
    done
    step_id=
}

# shellcheck disable=SC2329 # called by a trap
on_warning() {
    warned=1
    say "300 s of the time limit are left: the ranks finish their step and save"
    # srun passes it on. Ranks that are still starting do not hear it, so it is said again.
    (while [ -n "$step_id" ] && kill -USR1 "$step_id" 2>/dev/null; do sleep 5; done) &
}

# shellcheck disable=SC2329 # called by a trap
on_leave() {
    asked=1
    say "Slurm asks this job to leave"
}

# One field of Slurm's record of this job.
field() { scontrol show job "$task" -o | grep -o " $1=[^ ]*" | head -n 1 | cut -d = -f 2; }

# End here if Slurm has put this job back into the queue by itself.
put_back_already() {
    local starts
    starts=$(field Restarts)
    if [ "${starts:-0}" -gt "$restart" ]; then
        record requeue "preempted, or requeued from outside"
        rm -f "$run_dir/slurm/begun"
        exit 0
    fi
}

# What to do when the ranks have ended, however they did.
after_the_ranks() { # after_the_ranks EXIT_CODE
    if is_complete; then
        rm -f "$run_dir/strikes"
        finish 0 "complete at step $(cat "$run_dir/complete")"
    fi
    if [ -e "$run_dir/stopped" ]; then
        finish 4 "stopped: $(cat "$run_dir/stopped")"
    fi
    if [ -e "$run_dir/waiting" ]; then
        rm -f "$run_dir/strikes"
        finish 0 "$(cat "$run_dir/waiting")"
    fi
    if [ -n "$asked" ]; then
        put_back_already
        if [ "$(field Reason)" = TimeLimit ]; then
            strike "the time limit came before a checkpoint"
            again "time limit, before the ranks had saved"
        elif [ "$(field JobState)" = RUNNING ]; then
            again "asked to leave (preemption with a grace time)"
        fi
        finish 3 "cancelled"
    fi
    if [ -n "$warned" ]; then
        strike "the time limit came before a checkpoint"
        again "time limit"
    fi
    strike "the ranks ended with exit code $1"
    again "the ranks ended with exit code $1; see $run_dir/logs"
}

trap on_warning USR1
trap on_leave TERM

if is_complete; then
    finish 0 "complete at step $(cat "$run_dir/complete")"
fi
if [ -e "$run_dir/stopped" ]; then
    finish 4 "stopped: $(cat "$run_dir/stopped")"
fi
if [ -e "$run_dir/slurm/begun" ]; then # the last start could not say how it ended
    record lost "the last start was cut off: a node failed, or its script was killed"
    strike "cut off"
fi
latest >"$run_dir/slurm/begun" || finish 1 "$run_dir/slurm/begun cannot be written: the disk is full, or the folder is read-only"
record start "start $((restart + 1)), strikes $(strikes)"

# ---- The nodes, before the ranks -------------------------------------------------------------

answers="$run_dir/slurm/health/$SLURM_JOB_ID.$restart"
mkdir -p "$answers" || finish 1 "$answers cannot be made: the disk is full, or the folder may not be written"
health=(
    --folder "$answers"
    --disk "$run_dir" "${TMPDIR:-/tmp}"
    --gpus 8
    --time "$(date +%s)"
    --timeout-seconds 120
    --min-free-disk-gb 1.0
    --min-free-memory-gb 1.0
    --max-clock-skew-seconds 10.0
    --max-gpu-temperature 85
    --max-gpu-memory-used-mb 2000
)
in_foreground timeout 120 srun --nodes=8 --ntasks=8 --ntasks-per-node=1 \
    --overlap --kill-on-bad-exit=0 --output="${answers//%/%%}/%t.log" \
    "${container[@]}" "${inside[@]}" "$python" -m slurm.health "${health[@]}"
[ -z "$asked$warned" ] || after_the_ranks 0
good=0
found=()
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    answer=$(cat "$answers/$node" 2>/dev/null || echo "has not answered the health check")
    if [ "$answer" = ok ]; then
        good=$((good + 1))
    else
        found+=("$node"$'\t'"$answer")
        say "bad node $node: $answer"
    fi
done
if [ "$good" -eq 0 ]; then # then it is not the nodes
    strike "no node passed the health check"
    again "no node passed the health check; see $answers"
fi
if [ ${#found[@]} -gt 0 ]; then
    printf '%s\n' "${found[@]}" >>"$run_dir/bad-nodes" || finish 1 "$run_dir/bad-nodes cannot be written"
    rm -f "$run_dir/slurm/begun" # no failure of the run
    again "bad nodes: $(printf '%s\n' "${found[@]}" | cut -f 1 | paste -sd ,)"
fi
# One all-reduce over all ranks of some nodes.
# shellcheck disable=SC2329 # called through in_foreground
all_reduce() { # all_reduce LOG NODE...
    local log=$1
    shift
    MASTER_ADDR=$1 timeout 120 srun --nodelist="$(IFS=,; echo "$*")" --nodes=$# \
        --ntasks=$(($# * 8)) --ntasks-per-node=8 \
        --overlap --kill-on-bad-exit=1 --output="${answers//%/%%}/$log-%t.log" \
        "${container[@]}" "${inside[@]}" "$python" -m parallel.all_reduce 16.0
}

# Which node is it? Each with its two neighbours in a ring, pairs that share no node at the same
# time; two nodes each alone. Answers are files, one for each that works.
# shellcheck disable=SC2329 # called through in_foreground
try_in_pairs() {
    local n=${#nodes[@]} round i mine
    for round in 0 1 2; do
        for ((i = 0; i < n; i++)); do
            mine=$((i % 2))
            if [ "$i" -eq $((n - 1)) ] && [ $((n % 2)) -eq 1 ]; then mine=2; fi # closes an odd ring
            [ "$mine" -eq "$round" ] || continue
            if [ "$n" -le 2 ]; then
                (all_reduce "alone-$i" "${nodes[i]}" && touch "$answers/works-$i") &
            else
                (all_reduce "pair-$i" "${nodes[i]}" "${nodes[(i + 1) % n]}" && touch "$answers/works-$i") &
            fi
        done
        wait
    done
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
in_foreground all_reduce all-reduce "${nodes[@]}"
[ -z "$asked$warned" ] || after_the_ranks 0
if [ "$code" -ne 0 ]; then
    say "the all-reduce failed; looking for the node"
    in_foreground try_in_pairs
    [ -z "$asked$warned" ] || after_the_ranks 0
    found=()
    for i in "${!nodes[@]}"; do
        before=$(((i + ${#nodes[@]} - 1) % ${#nodes[@]}))
        [ "${#nodes[@]}" -ne 2 ] || before=$i
        [ -e "$answers/works-$i" ] || [ -e "$answers/works-$before" ] || found+=("${nodes[i]}")
    done
    if [ ${#found[@]} -gt 0 ] && [ ${#found[@]} -lt ${#nodes[@]} ]; then
        printf '%s\tfails the all-reduce with every neighbour, or alone\n' "${found[@]}" >>"$run_dir/bad-nodes" ||
            finish 1 "$run_dir/bad-nodes cannot be written"
        rm -f "$run_dir/slurm/begun" # no failure of the run
        again "bad nodes: $(IFS=,; echo "${found[*]}")"
    fi
    strike "the all-reduce before the run failed, and no node alone is at fault"
    again "the all-reduce before the run failed, and no node alone is at fault; see $answers"
fi

# ---- The ranks -------------------------------------------------------------------------------

# One launcher a node, which starts its ranks.
ranks=(
    --nodes=8 --ntasks=8 --ntasks-per-node=1
    --kill-on-bad-exit=1 # one lost rank ends the others
    --output="$output/logs/launcher%t.log" --open-mode=append
)
train=("$python" -m train --config-dir "$recipe" experiment=submitted)

# The warning reaches every process of a node and ends one that does not expect it, so it is ignored
# until the ranks have a handler.
# shellcheck disable=SC2016 # expanded on the node
on_node='trap "" USR1; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"'
launcher=(
    "$python" -m torch.distributed.run
    --nnodes=8
    --nproc-per-node=8
    --max-restarts=0 # the chain restarts, after a health check
    --master-addr="$MASTER_ADDR"
    --master-port="$MASTER_PORT"
    --shutdown-timeout=300 # time to save after SIGTERM
    --numa-binding=node
    --redirects=3
    --log-dir="$run_dir/logs/$SLURM_JOB_ID.$restart"
    --no-python
)
in_foreground srun "${ranks[@]}" "${container[@]}" "${inside[@]}" \
    bash -c "$on_node" node "${launcher[@]}" "${train[@]}"

after_the_ranks "$code"
