"""The report: records in, statistics, tables, plots, one HTML page and model cards out.

Knows points and records; nothing of tensors, Ray or vLLM. `card`, `summary` and `wording` are cheap to
import; `statistics`, `plot`, `page` and `table` bring their libraries and are imported when reporting.
"""
