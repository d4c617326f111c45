"""Forecasting with a Transformer, beside an LSTM and the simple methods that it has to beat. See README.md.

python -m examples.forecast
"""
