"""Score generated images or videos: python scripts/evaluate.py image --real DIR --generated DIR --out DIR"""

from mhla_diffusion.evaluation.cli import main

if __name__ == "__main__":
    main()
