"""Measurements, each one command; `bench.study` compares arms of training over seeds."""
