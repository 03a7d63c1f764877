"""Running a quantized model from its packed weights, without ever decoding all of them."""
