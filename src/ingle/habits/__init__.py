"""What people type who come from other tools, and what that is here: tables to read, and lookups in them."""
