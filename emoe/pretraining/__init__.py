"""Training a new language model from scratch: text, tokenizer, loop, evaluation."""
