"""The same recipes inside other engines. Each module needs the extra that its docstring names."""
