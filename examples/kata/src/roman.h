#ifndef ROMAN_H
#define ROMAN_H

#include <stddef.h>

/* The largest number that the seven letters can write in the usual way. */
#define ROMAN_MAX 3999

/* Longest numeral, MMMDCCCLXXXVIII, and its NUL. */
#define ROMAN_SIZE 16

/* Write n, from 1 to ROMAN_MAX, into out. Returns the length, or 0 if n can't be written. */
size_t roman_write(unsigned n, char out[ROMAN_SIZE]);

/* The number that text stands for, upper or lower case; 0 if it is not a proper numeral. */
unsigned roman_read(const char *text);

#endif
