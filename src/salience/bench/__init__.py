"""What `salience bench` measures: kernels beside a floor, decoding, and quantization."""
