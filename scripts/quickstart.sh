#!/usr/bin/env bash
# From nothing to scored images of classes, images of texts, or videos: environment, data, training, generation,
# report. After installation some 6 minutes on 2 cores with AVX512 for images, 15 for texts, 8 for videos. Runs again
# from where it stopped; delete the folder in runs/ to start over.
#   bash scripts/quickstart.sh [image|text|video]
set -euo pipefail
cd "$(dirname "$0")/.."
kind="${1:-image}"
case "$kind" in
    image) out=runs/quickstart config=configs/image_dit_mnist.yaml ;;
    text) out=runs/quickstart_text config=configs/image_pixart_scenes.yaml ;;
    video) out=runs/quickstart_video config=configs/video_wan_moving_mnist.yaml ;;
    *) echo "error: say image, text or video, got $kind" >&2; exit 2 ;;
esac
source scripts/environment.sh demo

python=.venv/bin/python
# glibc, as it comes, gives the memory of large tensors back to the system and asks for it anew: slow if models are
# small.
launch="env MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4294967296 .venv/bin/accelerate launch"
launch="$launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
launch="$launch --num_cpu_threads_per_process $($python -c 'import os; print(os.cpu_count())')"

task=${kind/text/image} # of the commands

train() {
    [ -d $out/training/pipeline ] && return
    $launch scripts/train_$task.py --config $config --output_dir $out/training --resume auto
}

score() {
    [ -f $out/report/report.html ] || $python scripts/evaluate.py $task --real $out/real \
        --generated $out/generated --out $out/report "$@"
}

if [ $kind = image ]; then
    echo "== real images to score against: 1,000 of the 5,000 digits of MNIST"
    [ -d $out/real ] || $python scripts/export_images.py --data.source mnist --data.sizes "[[24, 24]]" \
        --num 1000 --out $out/real
    echo "== training a small DiT with MHLA"
    train
    echo "== generating images"
    $launch scripts/generate.py image --model $out/training/pipeline --out $out/generated --num 300 \
        --batch_size 50 --steps 16 --guidance 2.5 --grid $out/grid.png
    echo "== scoring them"
    score
    echo "== speed of the operator on this machine"
    $python scripts/benchmark.py operator --shapes "[1k, 4k]" --dtypes "[float32]" --passes "[forward]" \
        --scaling false
    look="images: $out/grid.png (columns are the classes 0 to 9)"
elif [ $kind = text ]; then
    echo "== real images to score against: 288 scenes, of the 72 combinations that training does not see"
    [ -d $out/real ] || $python scripts/export_images.py --data.source scene --data.scenes.held_out true \
        --data.scenes.num_images 288 --captions true --out $out/real
    echo "== training a small PixArt with MHLA"
    train
    echo "== generating images of 16 prompts: the last eight are of combinations that it did not see"
    cat > $out/prompts.txt << end
one red circle on the right
two purple triangles at the top
three orange squares at the top
one yellow cross on the left
two blue circles on the right
three red crosses on the right
one orange square on the right
two green crosses on the left
one blue cross on the right
two red circles at the bottom
three green circles at the bottom
one yellow triangle on the left
two orange squares on the right
three purple squares on the left
two blue triangles on the right
three red circles at the top
end
    $launch scripts/generate.py image --model $out/training/pipeline --out $out/shown --prompts $out/prompts.txt \
        --batch_size 16 --steps 20 --guidance 2.5 --seed 1 --grid $out/grid.png
    echo "== generating an image for each real one, and scoring them"
    $launch scripts/generate.py image --model $out/training/pipeline --out $out/generated \
        --prompts $out/real/captions.csv --batch_size 48 --steps 20 --guidance 2.5
    score
    look="images: $out/grid.png (the two lower rows are of combinations that training did not see)"
else
    echo "== real videos to score against: 100 of the 10,000 moving digits, with captions"
    [ -d $out/real ] || $python scripts/export_videos.py --data.source moving_mnist --data.frames 8 \
        --data.sizes "[[24, 24]]" --data.moving_digits.digits 1 --data.moving_digits.digit_size 18 \
        --data.moving_digits.speed 0.14 --data.moving_digits.bounce false --num 100 --out $out/real
    echo "== training a small Wan with MHLA"
    train
    echo "== generating videos: every digit in every direction"
    ways=(right down "up and left" up "down and right" left "up and right" "down and left")
    for i in {0..79}; do # each pair once, and no two alike one after the other
        echo "digit $((i % 10)) moving ${ways[$(((i + i / 40) % 8))]}"
    done > $out/prompts.txt
    $launch scripts/generate.py video --model $out/training/pipeline --out $out/generated \
        --prompts $out/prompts.txt --batch_size 16 --steps 20 --guidance 2.5 --strip $out/strip.png
    echo "== scoring them"
    score --frames 8
    look="videos: $out/generated/*.mp4; $out/strip.png has the frames of the first eight, a row for each"
fi

echo
echo "$look"
echo "report: $out/report/report.html"
echo "pipeline: $out/training/pipeline"
