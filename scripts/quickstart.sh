#!/usr/bin/env bash
# From nothing to scored images: environment, MNIST, training, generation, report. At most 8 minutes on 2 cores
# after installation. Runs again from where it stopped; delete runs/quickstart to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh demo

out=runs/quickstart
python=.venv/bin/python
launch=".venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
launch="$launch --num_cpu_threads_per_process $($python -c 'import os; print(os.cpu_count())')"

echo "== real images to score against: 1,000 of the 5,000 digits of MNIST"
[ -d $out/real ] || $python scripts/export_images.py --data.source mnist --num 1000 --out $out/real

if [ ! -d $out/training/pipeline ]; then
    echo "== training a small DiT with MHLA"
    if ls -d $out/training/checkpoints/step-* > /dev/null 2>&1; then
        resume="--resume latest"
    else
        resume=""
        rm -rf $out/training # what a run leaves that was killed before its first checkpoint
    fi
    $launch scripts/train_image.py --config configs/image_dit_mnist.yaml --output_dir $out/training $resume
fi

echo "== generating images"
$launch scripts/generate.py image --model $out/training/pipeline --out $out/generated --num 300 --batch_size 50 \
    --steps 16 --guidance 2.5 --grid $out/grid.png

echo "== scoring them"
[ -f $out/report/report.html ] || $python scripts/evaluate.py image --real $out/real \
    --generated $out/generated --out $out/report

echo "== speed of the operator on this machine"
$python scripts/benchmark.py operator --shapes "[1k, 4k]" --dtypes "[float32]" --passes "[forward]" --scaling false

echo
echo "images: $out/grid.png (columns are the classes 0 to 9)"
echo "report: $out/report/report.html"
echo "pipeline: $out/training/pipeline"
