"""The report: records in, statistics, tables, pictures, one HTML page and model cards out.

Knows points and records; nothing of tensors, Ray or vLLM. `card`, `summary` and `wording` are cheap to
import; `statistics`, `pictures`, `page` and `terminal` bring their libraries and are imported when reporting.
"""
