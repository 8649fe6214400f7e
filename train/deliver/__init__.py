"""From a finished run to something that is used: prediction, export, quantization."""
