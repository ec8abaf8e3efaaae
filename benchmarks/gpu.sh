#!/bin/sh
# All that is to be measured on one GPU, the quickest and the most wanted first; then the tables.
# A match's JSON is written when it is over, so that `timeout` costs what is under way alone.
results=benchmarks/results
trap 'python -m benchmarks.table' EXIT
trap 'exit 143' TERM
python -m benchmarks.run llama_1b resnet50 gpt2_1.5b --rounds 5
"${LSDL_PEERS_PYTHON:-python}" -m benchmarks.save --out $results/alone/save.json
python -m benchmarks.start --config configs/stdlib_gpt.py --config.model.width=768 \
    --config.model.num_layers=12 --config.model.num_heads=12 --config.model.mlp_dim=3072 \
    --config.precision=bfloat16 --out $results/alone/start.json
python -m benchmarks.capacity --out $results/planned/capacity.json
python -m benchmarks.run gpt2_124m vit_b16
python -m benchmarks.bracket --out $results/planned/bracket.json
