#!/bin/bash
# ImageNet on several nodes under Slurm. From the repository's root:
#
#   sbatch examples/slurm_imagenet.sh hparams/imagenet/resnet50/layerwise_l2_onlynorm.yaml [more options of train.py]
#
# Adapt nodes and devices: nodes x devices x --batch-size is the batch. A run that meets its time limit writes a
# checkpoint, goes back into the queue and continues there. After a failed node it continues from the last epoch.
#SBATCH --job-name=sam_on
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

export RECIPE=${1:?name a recipe, such as hparams/imagenet/resnet50/layerwise_l2_onlynorm.yaml}
export DATA_DIR=${DATA_DIR:-/data/imagenet}
export EXPERIMENT=${EXPERIMENT:-$SLURM_JOB_NAME-$SLURM_JOB_ID} # a requeued job keeps its number, and so its folder
export DEVICES=${SLURM_GPUS_ON_NODE:-4} NODES=$SLURM_JOB_NUM_NODES JOB=$SLURM_JOB_ID
export RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
shift

# What runs on each node. Five minutes before the end Slurm sends SIGUSR1 to every process of the step. All but this
# shell ignore it, and the shell sends SIGTERM to the training processes alone, the children of torchrun: torchrun
# itself would give them 30 seconds for it. It looks at its children every ten seconds only, so that the first one to
# end does not make it stop another that is still leaving.
on_each_node='
    stopped=0
    trap "" USR1 # ignored by all that is started from here on
    torchrun --nnodes "$NODES" --nproc-per-node "$DEVICES" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" \
        --rdzv-id "$JOB" --monitor-interval 10 \
        train.py -c "$RECIPE" --data-dir "$DATA_DIR" --experiment "$EXPERIMENT" --resume auto "$@" &
    torchrun=$!
    trap "stopped=1; pkill -TERM -P $torchrun" USR1
    while wait "$torchrun"; code=$?; [ "$code" -gt 128 ] && kill -0 "$torchrun" 2> /dev/null; do :; done
    [ "$stopped" = 1 ] && [ "$code" != 0 ] && code=75 # the code of train.py itself, which torchrun does not pass on
    exit "$code"
'
# some versions of srun give a step one CPU per task unless told
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-32}" bash -c "$on_each_node" on_each_node "$@"
code=$?
if [ "$code" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
