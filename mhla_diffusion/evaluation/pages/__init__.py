"""Pages: scores and samples as JSON, Markdown and self-contained HTML."""
