#!/bin/bash
# The speedrun on two nodes of a Slurm cluster: sbatch howto/slurm.sh, from the checkout, after `make setup`.
# The checkout and $NANOCHAT_HOME must be on a disk that all nodes share. Submitted again, it goes on where it stopped.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=06:00:00
set -euo pipefail
export NANOCHAT_HOME=${NANOCHAT_HOME:-$HOME/.cache/nanochat}
export NNODES=$SLURM_JOB_NUM_NODES
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
mkdir -p "$NANOCHAT_HOME"
srun bash -c 'NODE_RANK=$SLURM_NODEID exec .venv/bin/papermill speedrun.ipynb "$NANOCHAT_HOME/node$SLURM_NODEID.ipynb" \
  -p profile speedrun -p run two-nodes --kernel python3 --log-output --no-progress-bar'
