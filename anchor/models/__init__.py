"""The causal LM as encoder and decoder of packs. Only here does anchor use peft and concrete transformers models."""
