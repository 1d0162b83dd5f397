"""HumanEval and HumanEval+: lm-eval's definitions, with the answers judged in our sandbox."""
