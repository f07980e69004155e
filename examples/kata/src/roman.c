#include "roman.h"

#include <ctype.h>
#include <string.h>

#ifdef FAIL_COMPILE
#error "FAIL says: compile. This build is meant to break here."
#endif

static const struct {
    unsigned value;
    const char *letters;
} parts[] = {
    {1000, "M"}, {900, "CM"}, {500, "D"}, {400, "CD"}, {100, "C"}, {90, "XC"}, {50, "L"},
    {40, "XL"},  {10, "X"},   {9, "IX"},  {5, "V"},    {4, "IV"},  {1, "I"},
};

size_t roman_write(unsigned n, char out[ROMAN_SIZE])
{
    size_t length = 0;

    if (n == 0 || n > ROMAN_MAX)
        return 0;
    for (size_t i = 0; n > 0; i++)
        for (; n >= parts[i].value; n -= parts[i].value)
            for (const char *letter = parts[i].letters; *letter; letter++)
                out[length++] = *letter;
    out[length] = '\0';
    return length;
}

unsigned roman_read(const char *text)
{
    char upper[ROMAN_SIZE], again[ROMAN_SIZE];
    const char *rest = upper;
    unsigned n = 0;
    size_t length = strlen(text);

    if (length == 0 || length >= ROMAN_SIZE)
        return 0;
    for (size_t i = 0; i <= length; i++)
        upper[i] = (char)toupper((unsigned char)text[i]);
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        size_t size = strlen(parts[i].letters);
        for (; strncmp(rest, parts[i].letters, size) == 0; rest += size)
            n += parts[i].value;
    }
    /* IIII, VX and the like are read by the above: only what is written back the same is proper. */
    if (*rest || !roman_write(n, again) || strcmp(upper, again) != 0)
        return 0;
    return n;
}
