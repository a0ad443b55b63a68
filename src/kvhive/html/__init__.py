"""Self-contained HTML pages: no script, font or picture is fetched from anywhere."""
