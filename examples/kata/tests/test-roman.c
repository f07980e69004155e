#include <kata/check.h>
#include <string.h>

#include "roman.h"

static const char *written(unsigned n)
{
    static char numeral[ROMAN_SIZE];

    return roman_write(n, numeral) ? numeral : "";
}

int main(void)
{
    CHECK(strcmp(written(1), "I") == 0);
    CHECK(strcmp(written(4), "IV") == 0);
    CHECK(strcmp(written(1994), "MCMXCIV") == 0);
    CHECK(strcmp(written(2012), "MMXII") == 0);
    CHECK(strcmp(written(3888), "MMMDCCCLXXXVIII") == 0);
    CHECK(strcmp(written(3999), "MMMCMXCIX") == 0);
    CHECK(strcmp(written(0), "") == 0);
    CHECK(strcmp(written(4000), "") == 0);

    for (unsigned n = 1; n <= ROMAN_MAX; n++)
        CHECK(roman_read(written(n)) == n);

    CHECK(roman_read("mmxii") == 2012);
    CHECK(roman_read("") == 0);
    CHECK(roman_read("IIII") == 0);
    CHECK(roman_read("VX") == 0);
    CHECK(roman_read("MMMM") == 0);
    CHECK(roman_read("2012") == 0);
    CHECK(roman_read("MMMDCCCLXXXVIIII") == 0);
#ifdef FAIL_TEST
    CHECK(!"FAIL says: test. This build is meant to break here.");
#endif
    return check_done("roman");
}
