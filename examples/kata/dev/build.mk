# How every kata is built: flags, and rules from src/*.c to build/.
CC = gcc
CFLAGS ?= -O1
KATA_CFLAGS = -std=c11 -Wall -Wextra -Werror -I$(KATA_DEV)/include -DVERSION='"$(VERSION)"'

build/%.o: src/%.c $(wildcard src/*.h)
	@mkdir -p build
	$(CC) $(KATA_CFLAGS) $(CPPFLAGS) $(CFLAGS) -c -o $@ $<

build/test-%: tests/test-%.c $(wildcard src/*.h)
	@mkdir -p build
	$(CC) $(KATA_CFLAGS) $(CPPFLAGS) $(CFLAGS) -Isrc -o $@ $(filter %.c %.o,$^)
