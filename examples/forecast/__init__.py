"""Forecasting with a Transformer, compared with an LSTM and the simple methods that it has to beat. See docs/cases.md.

python -m examples.forecast
"""
