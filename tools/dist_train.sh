#!/usr/bin/env bash
# tools/dist_train.sh CONFIG PROCESSES [flags of tools/train.py]
set -euo pipefail
CONFIG=$1
PROCESSES=$2
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$PROCESSES" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "${@:3}"
