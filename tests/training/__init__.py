"""Training as people do it, with a converted network and by hand with a plain one."""
