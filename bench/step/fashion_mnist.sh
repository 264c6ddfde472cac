#!/bin/bash
# Accuracy, seconds and bytes of dense LARS and of JointSpar-LARS at budget 0.5, on 2 MPI ranks, same schedule and seed.
# Needs the data set (Debian package dataset-fashion-mnist) and a free machine of two cores for about 20 minutes.
set -euo pipefail
out=${1:?usage: fashion_mnist.sh OUT}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
run() {
    local name=$1
    shift
    mpirun -n 2 python -m jointspar train --dataset fashion-mnist --model resnet20 --epochs 3 --batch-size 64 \
        --base-lr 0.4 --milestones 2 2.7 --seed 0 "$@" --out "$out/$name"
}
run lars --method lars
run stratified --method jointspar-lars --budget 0.5 --strategy stratified
run independent --method jointspar-lars --budget 0.5 --strategy independent
run shared --method jointspar-lars --budget 0.5 --strategy shared
