"""Points × tasks → records, on Ray and vLLM: what is asked, who answers it, and what is remembered of it."""
