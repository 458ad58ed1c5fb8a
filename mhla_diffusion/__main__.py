"""``python -m mhla_diffusion`` is ``mhla``, for launchers such as ``accelerate launch -m mhla_diffusion``."""

from .commands.main import main

if __name__ == "__main__":
    main()
