"""The causal LM as encoder and decoder of packs. The only place for transformers' model classes and peft."""
