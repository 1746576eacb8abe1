#!/usr/bin/env bash
# Installs a wheel into an empty environment outside the clone, trains the packaged demo for two steps, embeds
# pictures, searches them and encodes in Python.
# Usage: try_wheel.sh PYTHON WHEEL
set -euo pipefail
wheel=$(realpath "$2")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$1" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check "$wheel"
export PATH="$folder/venv/bin:$PATH" PARALLEL_DECOUPLING_CACHE="$folder/cache"
unset PYTHONPATH
parallel-decoupling fit --config demo.yaml --trainer.max_steps 2 --trainer.default_root_dir run
pictures=$(python -c 'from parallel_decoupling.world.benchmark import ensure_benchmark; print(ensure_benchmark())')/MMEB-eval/Scene_t2i
parallel-decoupling predict --ckpt_path run/checkpoints/last.ckpt --data.predict_source "$pictures" --output_dir embeddings
parallel-decoupling search embeddings --model run --text "a red circle"
python -c 'from parallel_decoupling import Embedder; print(Embedder.from_pretrained("run").encode("a red circle").shape)'
echo "The wheel works outside the clone."
