"""megavl: 3D-parallel pretraining of DeepSeek-VL vision-language models on PyTorch and DeepSpeed."""

__version__ = "0.1.0"
