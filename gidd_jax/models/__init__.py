"""Networks: the denoising transformer (`dit`) and the autoregressive baseline (`llama`)."""
